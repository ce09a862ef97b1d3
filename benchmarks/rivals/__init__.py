"""What we are measured against: torch.distributed over gloo, at its best known settings."""
