"""What stands around the package: installation, system packages for tests, Prometheus, Alertmanager, Grafana, Kubernetes, images, Terraform."""
