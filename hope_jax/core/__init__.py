"""What a level is. Knows no sequence, no file and no Flax."""
