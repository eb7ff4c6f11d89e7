"""What an attention costs: time, memory, launches, and what is known of them on paper."""
