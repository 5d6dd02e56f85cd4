"""What a network is: one decoder over data, never over names."""
