"""What each kind of step does: a function of the step, the bench and the folder to write into."""
