"""What is under `deploy/`: read as Kubernetes, Dagster and the image's builder read it, and run as far as one machine can."""
