//! The format of a stored value: format byte, flags, revision, then the bytes of the user.
