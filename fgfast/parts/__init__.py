"""Part discovery: clustering the pixels of an encoder's features, stored as id maps."""
