"""Statistics of a site's input, and the criteria that rank its units by them."""
