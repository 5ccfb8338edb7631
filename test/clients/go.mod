module github.com/deputy-id/deputy/test/clients

go 1.26.0
