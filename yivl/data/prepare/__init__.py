"""From the official annotation files of the published data to rows."""
