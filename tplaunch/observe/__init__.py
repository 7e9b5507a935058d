"""What a run says about itself: readers of its records, each on a thread of its own, and what they are told beside."""
