"""Results of runs beside the rows of the paper: tables and figures."""
