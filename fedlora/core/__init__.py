"""Values and ground rules that every room stands on."""
