"""Dagster with Celery's workers as a deployment of many hosts has it, on one machine: `make cluster`, and its tests."""
