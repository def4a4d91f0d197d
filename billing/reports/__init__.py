"""What people and operators read: statements, usage, revenue, how a charge came about. Posts nothing."""
