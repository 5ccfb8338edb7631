package endpoint

import (
	"context"

	"github.com/hashicorp/go-hclog"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// levels is SPIRE's logger API. Its two levels above ERROR are ERROR here.
type levels struct {
	loggerv1.UnimplementedLoggerServer
	log    hclog.Logger
	launch hclog.Level
}

var toLevel = map[types.LogLevel]hclog.Level{
	types.LogLevel_PANIC: hclog.Error,
	types.LogLevel_FATAL: hclog.Error,
	types.LogLevel_ERROR: hclog.Error,
	types.LogLevel_WARN:  hclog.Warn,
	types.LogLevel_INFO:  hclog.Info,
	types.LogLevel_DEBUG: hclog.Debug,
	types.LogLevel_TRACE: hclog.Trace,
}

func fromLevel(l hclog.Level) types.LogLevel {
	switch l {
	case hclog.Trace:
		return types.LogLevel_TRACE
	case hclog.Debug:
		return types.LogLevel_DEBUG
	case hclog.Warn:
		return types.LogLevel_WARN
	case hclog.Error:
		return types.LogLevel_ERROR
	case hclog.Off:
		return types.LogLevel_PANIC
	}
	return types.LogLevel_INFO // hclog's own default
}

func (a *levels) now() *types.Logger {
	return &types.Logger{CurrentLevel: fromLevel(a.log.GetLevel()), LaunchLevel: fromLevel(a.launch)}
}

func (a *levels) GetLogger(context.Context, *loggerv1.GetLoggerRequest) (*types.Logger, error) {
	return a.now(), nil
}

func (a *levels) SetLogLevel(_ context.Context, in *loggerv1.SetLogLevelRequest) (*types.Logger, error) {
	l, ok := toLevel[in.NewLevel]
	if !ok {
		return nil, adminStatus(invalid("unsupported log level %d", in.NewLevel))
	}
	a.set(l)
	return a.now(), nil
}

func (a *levels) ResetLogLevel(context.Context, *loggerv1.ResetLogLevelRequest) (*types.Logger, error) {
	a.set(a.launch)
	return a.now(), nil
}

func (a *levels) set(l hclog.Level) {
	a.log.Info("log level set", "level", l)
	a.log.SetLevel(l)
}
