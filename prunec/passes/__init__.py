"""What changes a program: plans, allocation, compensation, slicing, and what joins them."""
