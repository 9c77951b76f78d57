locals {
  # Whom each role is for, and below which prefixes it may read, write and delete.
  roles = {
    encode = {
      service_accounts = ["lathe-encode"]
      read             = [var.prefixes.images, var.prefixes.autoencoder, var.prefixes.latents]
      write            = [var.prefixes.latents]
      # The empty prompt's files, where an output that holds nothing yet is begun with other settings, and what lathe
      # doctor writes to see whether it may.
      delete = ["${var.prefixes.latents}*empty.", "${var.prefixes.latents}*.lathe-doctor-"]
    }
    train = {
      service_accounts = ["lathe-train", "lathe-export"]
      read             = [var.prefixes.autoencoder, var.prefixes.latents, var.prefixes.runs]
      write            = [var.prefixes.runs]
      # Checkpoints that are no longer kept, leases.
      delete = [var.prefixes.runs]
    }
  }

  trusted = length(var.trusted_role_arns) > 0 || var.instance_profiles || var.pod_identity != null || var.irsa != null
  issuer  = var.irsa == null ? "" : regex("oidc-provider/(.+)$", var.irsa.provider_arn)[0]
}

# What pipeline/storage asks of S3, and nothing else; tests hold the two against each other.
data "aws_iam_policy_document" "storage" {
  for_each = local.roles

  # HeadBucket and the 404 of a missing object ask for ListBucket without a prefix: it cannot be narrowed to one.
  statement {
    sid       = "List"
    actions   = ["s3:ListBucket", "s3:ListBucketMultipartUploads"]
    resources = [aws_s3_bucket.data.arn]
  }

  statement {
    sid       = "Read"
    actions   = ["s3:GetObject"]
    resources = [for prefix in each.value.read : "${aws_s3_bucket.data.arn}/${prefix}*"]
  }

  statement {
    sid       = "Write"
    actions   = ["s3:PutObject", "s3:AbortMultipartUpload"]
    resources = [for prefix in each.value.write : "${aws_s3_bucket.data.arn}/${prefix}*"]
  }

  statement {
    sid       = "Delete"
    actions   = ["s3:DeleteObject"]
    resources = [for prefix in each.value.delete : "${aws_s3_bucket.data.arn}/${prefix}*"]
  }

  dynamic "statement" {
    for_each = var.kms_key_arn == null ? [] : [var.kms_key_arn]

    content {
      sid       = "Key"
      actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
      resources = [statement.value]
    }
  }
}

data "aws_iam_policy_document" "trust" {
  for_each = local.roles

  dynamic "statement" {
    for_each = length(var.trusted_role_arns) > 0 ? [var.trusted_role_arns] : []

    content {
      sid     = "Roles"
      actions = ["sts:AssumeRole"]

      principals {
        type        = "AWS"
        identifiers = statement.value
      }
    }
  }

  dynamic "statement" {
    for_each = var.instance_profiles ? ["ec2.amazonaws.com"] : []

    content {
      sid     = "Instances"
      actions = ["sts:AssumeRole"]

      principals {
        type        = "Service"
        identifiers = [statement.value]
      }
    }
  }

  dynamic "statement" {
    for_each = var.pod_identity == null ? [] : [var.pod_identity]

    content {
      sid     = "PodIdentity"
      actions = ["sts:AssumeRole", "sts:TagSession"]

      principals {
        type        = "Service"
        identifiers = ["pods.eks.amazonaws.com"]
      }

      condition {
        test     = "StringEquals"
        variable = "aws:RequestTag/kubernetes-namespace"
        values   = [statement.value.namespace]
      }

      condition {
        test     = "StringEquals"
        variable = "aws:RequestTag/kubernetes-service-account"
        values   = each.value.service_accounts
      }
    }
  }

  dynamic "statement" {
    for_each = var.irsa == null ? [] : [var.irsa]

    content {
      sid     = "ServiceAccounts"
      actions = ["sts:AssumeRoleWithWebIdentity"]

      principals {
        type        = "Federated"
        identifiers = [statement.value.provider_arn]
      }

      condition {
        test     = "StringEquals"
        variable = "${local.issuer}:aud"
        values   = ["sts.amazonaws.com"]
      }

      condition {
        test     = "StringEquals"
        variable = "${local.issuer}:sub"
        values   = [for account in each.value.service_accounts : "system:serviceaccount:${statement.value.namespace}:${account}"]
      }
    }
  }
}

resource "aws_iam_role" "storage" {
  for_each = local.roles

  name               = "${var.name}-${each.key}"
  description        = "What lathe ${each.key} may do in ${var.bucket}"
  assume_role_policy = data.aws_iam_policy_document.trust[each.key].json
  tags               = var.tags

  lifecycle {
    precondition {
      condition     = local.trusted
      error_message = "Nobody could take the roles: set trusted_role_arns, instance_profiles, pod_identity or irsa."
    }
  }
}

resource "aws_iam_role_policy" "storage" {
  for_each = local.roles

  name   = "storage"
  role   = aws_iam_role.storage[each.key].id
  policy = data.aws_iam_policy_document.storage[each.key].json
}

resource "aws_iam_instance_profile" "storage" {
  for_each = { for role, about in local.roles : role => about if var.instance_profiles }

  name = "${var.name}-${each.key}"
  role = aws_iam_role.storage[each.key].name
  tags = var.tags
}

resource "aws_eks_pod_identity_association" "storage" {
  for_each = {
    for one in flatten([
      for role, about in local.roles : [for account in about.service_accounts : { account = account, role = role }]
    ]) : one.account => one.role if var.pod_identity != null
  }

  cluster_name    = var.pod_identity.cluster
  namespace       = var.pod_identity.namespace
  service_account = each.key
  role_arn        = aws_iam_role.storage[each.value].arn
  tags            = var.tags
}
