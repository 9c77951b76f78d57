variable "bucket" {
  description = "Name of the bucket that holds image shards, latents and runs; unique in all of AWS."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.bucket))
    error_message = "bucket: 3 to 63 lower-case letters, digits and hyphens (dots break TLS for host names)."
  }
}

variable "name" {
  description = "Beginning of the names of roles and policies."
  type        = string
  default     = "lathe"

  validation {
    condition     = can(regex("^[a-zA-Z][a-zA-Z0-9-]{0,39}$", var.name))
    error_message = "name: at most 40 letters, digits and hyphens, beginning with a letter."
  }
}

variable "prefixes" {
  description = "Where in the bucket things are: what run files have below `root`. No prefix may be in another."
  type = object({
    images      = optional(string, "images/")
    autoencoder = optional(string, "autoencoder/")
    latents     = optional(string, "latents/")
    runs        = optional(string, "runs/")
    temporary   = optional(string, "tmp/")
  })
  default = {}

  validation {
    condition     = alltrue([for prefix in values(var.prefixes) : can(regex("^([A-Za-z0-9._-]+/)+$", prefix))])
    error_message = "prefixes: letters, digits, dots, hyphens, underscores; each part ends with a slash, none begins with one."
  }

  validation {
    condition = alltrue([
      for one in values(var.prefixes) : length([for other in values(var.prefixes) : other if startswith(other, one)]) == 1
    ])
    error_message = "prefixes: none may begin with another, or rights to one would be rights to the other."
  }
}

variable "kms_key_arn" {
  description = "Key that encrypts objects; null = keys of S3 itself (AES-256)."
  type        = string
  default     = null

  validation {
    condition     = var.kms_key_arn == null || can(regex("^arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]{12}:key/[A-Za-z0-9-]+$", var.kms_key_arn))
    error_message = "kms_key_arn: the ARN of a key (no alias)."
  }
}

variable "keep_deleted_days" {
  description = "For so long what was deleted or overwritten can be had back. Every checkpoint that is no longer kept costs its room for so long."
  type        = number
  default     = 7

  validation {
    condition     = var.keep_deleted_days >= 1 && floor(var.keep_deleted_days) == var.keep_deleted_days
    error_message = "keep_deleted_days: a whole number of days, 1 or more."
  }
}

variable "temporary_days" {
  description = "Objects below the temporary prefix are deleted after so long."
  type        = number
  default     = 7

  validation {
    condition     = var.temporary_days >= 1 && floor(var.temporary_days) == var.temporary_days
    error_message = "temporary_days: a whole number of days, 1 or more."
  }
}

variable "unfinished_upload_days" {
  description = "What killed uploads left is deleted after so long. Lathe itself sweeps what it knows of."
  type        = number
  default     = 3

  validation {
    condition     = var.unfinished_upload_days >= 1 && floor(var.unfinished_upload_days) == var.unfinished_upload_days
    error_message = "unfinished_upload_days: a whole number of days, 1 or more."
  }
}

variable "trusted_role_arns" {
  description = "Roles that may take the roles of encode and train, such as that of a SLURM cluster's nodes."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for arn in var.trusted_role_arns : can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:role/[A-Za-z0-9+=,.@_/-]+$", arn))])
    error_message = "trusted_role_arns: ARNs of roles, without wildcards."
  }
}

variable "instance_profiles" {
  description = "Let EC2 instances have the roles by instance profiles."
  type        = bool
  default     = false
}

variable "pod_identity" {
  description = "EKS cluster and namespace whose service accounts get the roles by EKS Pod Identity; null = none."
  type = object({
    cluster   = string
    namespace = optional(string, "lathe")
  })
  default = null
}

variable "irsa" {
  description = "IAM OIDC provider of a cluster, and the namespace whose service accounts get the roles by it; null = none."
  type = object({
    provider_arn = string
    namespace    = optional(string, "lathe")
  })
  default = null

  validation {
    condition     = var.irsa == null || can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:oidc-provider/[A-Za-z0-9./_-]+$", var.irsa.provider_arn))
    error_message = "irsa.provider_arn: the ARN of an IAM OIDC provider."
  }
}

variable "vpc_endpoint" {
  description = "VPC and route tables by which S3 is reached without a NAT gateway and its price per byte; null = none is made."
  type = object({
    vpc_id          = string
    route_table_ids = list(string)
  })
  default = null

  validation {
    condition     = var.vpc_endpoint == null || try(length(var.vpc_endpoint.route_table_ids) > 0, false)
    error_message = "vpc_endpoint.route_table_ids: at least one, or nothing is routed by it."
  }
}

variable "tags" {
  description = "Of everything that can have them."
  type        = map(string)
  default     = {}
}
