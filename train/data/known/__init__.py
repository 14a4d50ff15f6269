"""What earlier runs found out about record files, kept on disk."""
