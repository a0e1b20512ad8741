"""What Lightning calls: strategy, accelerator, precision, loops, and errors explained where they leave."""
