"""What `mocokit evaluate` does; how a backbone is judged is in protocols/."""
