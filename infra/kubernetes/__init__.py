"""Kubernetes for whoever keeps manifests in files: `python -m infra.kubernetes.generate`."""
