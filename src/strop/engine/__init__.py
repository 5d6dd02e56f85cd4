"""From requests to tokens: scheduling, the paged cache's bookkeeping, packing, the compiled step."""
