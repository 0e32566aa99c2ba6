"""What lies on disk: file formats, loading, saving, conversion."""
