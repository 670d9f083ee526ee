"""What this deployment exports: the one folder that its users edit. A folder an export, and the connections."""
