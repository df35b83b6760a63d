"""`python -m space_app`."""

from space_app.app import main


main()
