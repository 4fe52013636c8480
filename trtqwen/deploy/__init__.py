"""Files for the programs around a server: Prometheus, Grafana, Docker Compose, Kubernetes."""
