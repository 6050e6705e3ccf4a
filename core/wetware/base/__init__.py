"""What all rooms stand on; imports none of them."""
