"""Perplexity for stored bits: ours, by option, and that of other quantizers."""
