"""What policies learn and predict."""
