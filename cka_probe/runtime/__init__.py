"""What every run stands on, whatever it measures or trains: the folder of a run and its lock."""
