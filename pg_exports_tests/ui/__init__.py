"""Dagster's webserver and daemon as a deployment has them, and what their users see: by GraphQL, and in a browser."""
