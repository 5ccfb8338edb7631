module github.com/deputy-id/deputy/test/clients

go 1.26.0

require github.com/deputy-id/deputy v0.0.0

replace github.com/deputy-id/deputy => ../..
