"""What is run by hand: the command line, check, prove, audit, rehearse, doctor, and the testing kit."""
