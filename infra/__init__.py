"""What stands around the package: installation, programs for tests, monitoring, Kubernetes, images, Terraform."""
