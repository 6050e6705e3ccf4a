"""The node's side: settings, roles, the backend, the service for operators."""
