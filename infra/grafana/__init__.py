"""Grafana's dashboards, made from the metric table: `python -m infra.grafana.generate`."""
