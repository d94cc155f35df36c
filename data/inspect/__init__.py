"""Show prepared data, quarantined records and folders of conversations: python -m data.inspect."""
