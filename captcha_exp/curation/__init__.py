"""Better labels: images whose label looks wrong, for the user to look at."""
