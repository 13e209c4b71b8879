"""The frozen networks of stage one: each makes fields of the records from views or captions."""
