"""The YAML files that say what to run; this file lets them travel in the wheel."""
