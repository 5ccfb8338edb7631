delegated_identity {}
