output "root" {
  description = "What run files have as `root`."
  value       = "s3://${aws_s3_bucket.data.id}"
}

output "role_arns" {
  description = "Of encode and train: for service accounts' annotation eks.amazonaws.com/role-arn, or a profile's role_arn."
  value       = { for role, made in aws_iam_role.storage : role => made.arn }
}

output "instance_profiles" {
  description = "Of encode and train, for EC2 instances."
  value       = { for role, made in aws_iam_instance_profile.storage : role => made.name }
}
