"""The report as a page: one HTML file that opens without a server or a network, made from a finished run.

`choosing` says which samples, `totals` passes over the matrix once, `content` and `overview` say what is known of all
that, `showing` what the samples look like, `assembly` puts it into one file with what lies in `html`, `writing` fits
it under a limit, and `reported` is all of it with the table.
"""
