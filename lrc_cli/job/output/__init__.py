"""From packed factors to a finished directory."""
