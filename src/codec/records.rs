//! Records of the cluster map.
