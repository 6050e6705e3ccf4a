"""auth_local: users and roles in a document that the operator signs."""
