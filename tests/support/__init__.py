"""What tests share: data, small models, small runs."""
