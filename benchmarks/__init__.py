"""Where every claim of performance comes from: ours beside the rival, in one run, alternating."""
