// Command mosn is MOSN's own proxy, unmodified, composed from its Go module with the parts that Bolt needs.
//
// The module's own main package cannot be used: it links every filter there is, and one of them (seata) needs a module that the
// proxy no longer serves. The stages below are those of that main package, in its order.
package main

import (
	"os"
	"time"

	"github.com/urfave/cli"
	"mosn.io/api"
	v2 "mosn.io/mosn/pkg/config/v2"
	_ "mosn.io/mosn/pkg/filter/network/connectionmanager"
	_ "mosn.io/mosn/pkg/filter/network/proxy"
	"mosn.io/mosn/pkg/mosn"
	_ "mosn.io/mosn/pkg/network"
	_ "mosn.io/mosn/pkg/protocol"
	"mosn.io/mosn/pkg/protocol/xprotocol"
	"mosn.io/mosn/pkg/protocol/xprotocol/bolt"
	"mosn.io/mosn/pkg/protocol/xprotocol/boltv2"
	_ "mosn.io/mosn/pkg/router"
	"mosn.io/mosn/pkg/server"
	_ "mosn.io/mosn/pkg/server/keeper"
	"mosn.io/mosn/pkg/stagemanager"
	xstream "mosn.io/mosn/pkg/stream/xprotocol"
)

func registerBolt(*cli.Context) {
	xprotocol.RegisterXProtocolAction(xstream.NewConnPool, xstream.NewStreamFactory, func(api.XProtocolCodec) {})
	_ = xprotocol.RegisterXProtocolCodec(&bolt.XCodec{})
	_ = xprotocol.RegisterXProtocolCodec(&boltv2.XCodec{})
}

func start(c *cli.Context) error {
	stages := stagemanager.InitStageManager(c, c.String("config"), mosn.NewMosn())
	stages.AppendParamsParsedStage(registerBolt)
	stages.AppendInitStage(func(*v2.MOSNConfig) {
		server.SetDrainTime(time.Duration(c.Int("drain-time-s")) * time.Second)
	})
	stages.AppendInitStage(mosn.DefaultInitStage)
	stages.AppendPreStartStage(mosn.DefaultPreStartStage)
	stages.AppendStartStage(mosn.DefaultStartStage)
	stages.RunAll()
	return nil
}

func main() {
	app := cli.NewApp()
	app.Name = "mosn"
	app.Commands = []cli.Command{{
		Name: "start",
		Flags: []cli.Flag{
			cli.StringFlag{Name: "config, c"},
			cli.IntFlag{Name: "drain-time-s", Value: 5},
		},
		Action: start,
	}}
	if err := app.Run(os.Args); err != nil {
		os.Exit(1)
	}
}
