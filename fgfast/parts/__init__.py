"""Where parts come from: clustered pixels of an encoder, stored as id maps."""
