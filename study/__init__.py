"""Study: a whole experiment, from one YAML file to one report."""
