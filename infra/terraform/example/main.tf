# A bucket in Frankfurt for an EKS cluster, reached from its VPC without a NAT gateway.
terraform {
  required_version = ">= 1.6"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.40, < 7"
    }
  }
}

provider "aws" {
  region = "eu-central-1"
}

variable "vpc_id" {
  description = "The VPC of the cluster."
  type        = string
}

variable "route_table_ids" {
  description = "Those of its private subnets."
  type        = list(string)
}

module "lathe" {
  source = "../"

  bucket = "my-team-lathe"

  pod_identity = {
    cluster = "training"
  }

  vpc_endpoint = {
    vpc_id          = var.vpc_id
    route_table_ids = var.route_table_ids
  }

  tags = {
    project = "lathe"
  }
}

output "root" {
  description = "For run files."
  value       = module.lathe.root
}
